"""A device for tests where there is no GPU: see device.cpp. Named 'fake'."""
