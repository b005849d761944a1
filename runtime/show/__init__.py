"""How things are drawn, for the report of a build, the pictures of an answer and the plots of what is measured.

`kept` is what is shown: which cells of which frames stayed, and which frames became which. `frames` draws that over a
frame, `charts` what a page shows beside frames, `html` writes elements and escapes what is in them, `png` encodes
pixels, `pictures` makes pictures and clips of an answer, `figure` is an empty plot, `colours` are those of all of them.
Nothing here knows engines or videos.
"""
