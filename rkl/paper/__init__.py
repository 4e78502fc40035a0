"""The paper's tables as sets of runs, and the page that is written from their records."""
