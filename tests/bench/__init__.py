"""Measurements that a person runs by hand; no test asserts a time."""
