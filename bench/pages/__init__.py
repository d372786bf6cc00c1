"""Pages: what rows and summaries say, as figures and tables of self-contained HTML files."""
