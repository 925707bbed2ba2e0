"""The plan and the settings of every stage: YAML, Python, and the files of other tools. No torch."""
