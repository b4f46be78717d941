"""`python -m lingraft`: the command line."""

from lingraft.cli import main

main(prog_name="lingraft")
