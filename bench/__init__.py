"""bench: how good is a rule that learns feedback weights, once it is searched fairly?"""

__version__ = "0.1.0"
