"""The command line: one parser's habits for every command, experiments by name or file, and other trainers' names."""
