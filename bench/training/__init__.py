"""The parts of bench/train_cifar10.py, one concern per file.

settings.py      the options, the recipes and the checks on both
cifar.py         CIFAR-10: find it, verify it, fetch it
data.py          the data sets, and the one way a batch is made from them
models.py        any torchvision classifier, with its head, stem, activation and dropout
trainee.py       a backend's model, optimizer, training step and measurements
loop.py          the training loop and the evaluation
checkpoint.py    save atomically, load safely, refuse what does not fit
compare.py       medians, intervals and the verdict in words
report.py        report.json, report.md; plots.py draws the two pictures
distributed.py   torchrun
progress.py      tqdm in a terminal, plain lines elsewhere
errors.py        every way the program ends early, with its exit code
"""
