"""How things are drawn, for the report of a build, the pictures of an answer and the plots of what is measured.

`kept` is what is shown: which cells of which frames stayed, and which frames became which. `html` writes elements and
escapes what is in them, `charts` draws into them, `png` encodes pixels, `painting` draws onto frames, `pictures` makes
pictures and clips of an answer, `figure` is an empty plot. Nothing here knows engines or videos.
"""
