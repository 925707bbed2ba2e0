"""One function per stage: from a config section and the records before it to its own record.

Stages know no run directory; those that write large arrays get a folder to write them to.
"""
