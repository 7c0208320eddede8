"""What any program needs: files, results, processes, signals."""
