"""Tasks: what is asked, in which words, with which answers; and where their rows come from."""
