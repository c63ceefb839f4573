"""What a run reports: trackers, stage times, samples, logs and the report.

`trackers.RunLog` is what the loop holds; `report.write_report` reads a run folder afterwards.
Nothing here changes the results of the run. A run whose log cannot be written ends.
"""
