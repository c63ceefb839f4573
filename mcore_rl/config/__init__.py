"""The configuration: typed sections, composition from files and command line, cross-checks."""
