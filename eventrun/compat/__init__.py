"""The interfaces of other trackers on top of eventrun: change one import, keep the rest."""
