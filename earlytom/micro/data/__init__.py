"""Short labelled clips of moving shapes, and questions about them: what the bundled model is trained and tested on.

`scene` decides what happens in a clip, `render` draws it, `questions` asks about it, `splits` says which clips are
for training and which for testing. Everything follows from a seed and an index; nothing is stored.
"""

from earlytom.micro.data.questions import KINDS, Question
from earlytom.micro.data.splits import SPLITS, LabelledClip, labelled_clip

__all__ = ["KINDS", "SPLITS", "LabelledClip", "Question", "labelled_clip"]
