"""What every part shares: errors, devices and seeds, data sets, files, reports, pictures."""
