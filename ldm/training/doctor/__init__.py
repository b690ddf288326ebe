"""main.py --doctor: examine a training command without training; report its costs and its mistakes.

A problem stops the run, or lets it end without doing what its config says. A note is about something that works and may
not be meant. A check is a function that yields findings, named in CHECKS of checks.py.
"""

from ldm.training.doctor.examination import examine as examine
