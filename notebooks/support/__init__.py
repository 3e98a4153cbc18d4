"""What the notebooks share: data, runs, results, figures, report, book."""
