"""Benchmarks: ``make bench`` runs all of them and writes ``bench/results/<machine>/``. Not part of the package."""
