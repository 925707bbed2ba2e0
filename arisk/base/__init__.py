"""What everything stands on: errors, records and files, processes, tasks, the terminal."""
