"""The report's frame: page, sections, text and figures. It knows no capability and no stage by name."""
