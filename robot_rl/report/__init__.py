"""One self-contained HTML page about a run: figures, charts, videos. Reads files and numbers; runs nothing."""
