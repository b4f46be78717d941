"""What becomes of a run that is killed, starved, stopped, lied to, or not alone."""
