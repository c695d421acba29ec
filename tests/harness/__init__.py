"""What tests share: ranks, launchers, hosts, servers, damaged files."""
