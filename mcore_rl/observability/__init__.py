"""What a run tells about itself: trackers, stage times, samples, logs and the report.

`trackers.RunLog` is what the loop holds; `report.write_report` reads a run folder afterwards.
Nothing here changes what the run computes, and a run whose log cannot be written ends.
"""
