"""The `internvl-ds` command, and what its subcommands do."""
