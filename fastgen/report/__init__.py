"""The report: what runs have shown, as one page that opens from a file, and as tables and figures beside it."""
