"""One benchmark suite: ``python -m bench`` measures, ``python -m bench.report`` writes the README's figures.

A suite (:mod:`bench.suites`) only declares workloads: what is timed, what it must compute, which bytes have to move and
which figures it has to reach. :mod:`bench.runner` does the rest once for all of them: it compares every candidate with
the float64 reference, times all of them in one interleaved run (:mod:`bench.timer`), judges and writes a record.
"""
