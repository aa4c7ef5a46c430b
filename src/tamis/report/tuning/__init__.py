"""The tuning report: one self-contained HTML page about a profile, and about the survey it came from.

heads.py     a profile head by head
summary.py   headline and cards
charts.py    heat maps, tuned against held out, where the work goes
frontier.py  what the survey says about every other choice
explorer.py  the frontiers of model and layers, and a slider along one head's
page.py      the page and its sections, in reading order
"""

from tamis.report.tuning.page import render

__all__ = ["render"]
