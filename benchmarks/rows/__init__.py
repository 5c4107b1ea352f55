"""The rows of ``make bench``, one file a group: ``measure(folder, tiny=…)`` gives them."""
