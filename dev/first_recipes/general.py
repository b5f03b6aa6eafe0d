"""The general checkpoint: every sign in Noto style, long-tailed; trains the text encoder along with the UNet.

The committed weights are 4,313 of the 9,000 steps (276,032 canvases, the ones that data/frequency.json counts): 74 minutes
by --minutes on two busy cores, in three resumed runs with the rate falling to 2 % at the end. The first 920 steps drew t evenly,
the next thousand around 450. A rerun gives similar weights, not the same bits. By its steps the whole plan takes about an
hour and a half on two free cores.
"""

from .diffusion import Plan, train

PLAN = Plan("general", style="noto", domain=None, steps=9000)


def main(minutes=None, workers=1):
    train(PLAN, minutes, workers)
