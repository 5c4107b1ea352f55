"""The parts of ``make gpu``, one file each: ``rows(smoke)`` gives what is measured, ``columns`` what a table shows."""
