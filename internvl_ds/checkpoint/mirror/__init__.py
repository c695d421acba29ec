"""Tags in a second place: uploaded after the commit, fetched where OUTPUT was lost."""
