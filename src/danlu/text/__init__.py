"""From files, folders and packages to clean records: reading, formats, cleaning and duplicates."""
