"""The report of one run, or of two side by side: one self-contained HTML page.

    run folder -> `run.read_run` -> data -> `page.write_report` -> report.html

Python reads and computes; the page contains its results as JSON. `page.html`, `page.css` and the
scripts beside them show it. A folder's texts may be a stranger's: the scripts set them as text and
never as HTML, and the page's content security policy admits no other script.

| file | section |
|---|---|
| `run.py`, `numbers.js` | cards, table of numbers, memory, configuration |
| `curves.py`, `curves.js` | curves |
| `timeline.py`, `timeline.js` | stages of each step, who waited for whom |
| `excerpt.py`, `samples.js` | samples |
| `../alarms.py`, `alarms.js` | alarms |
"""
