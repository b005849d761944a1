"""Drawing, for build reports, pictures of answers and plots of measurements.

`kept` holds what is shown: kept cells of frames, and how frames were merged. `frames` draws it over a frame, `charts`
draws graphs for HTML pages, `html` writes escaped elements, `png` encodes pixels, `pictures` makes pictures and clips
of answers, `figure` makes matplotlib figures, `colours` has the common colours, `progress` a live line on a terminal.
None depends on engines or videos.
"""
