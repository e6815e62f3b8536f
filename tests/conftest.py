"""Properties have no time limit: how long an example takes is the machine's doing."""

from hypothesis import settings

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
