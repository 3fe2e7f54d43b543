"""Print the results of commands for people: one file per screen."""
