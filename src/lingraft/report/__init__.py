"""Reports: what a run's files say, as tables. Reads JSON only and never touches a model."""
