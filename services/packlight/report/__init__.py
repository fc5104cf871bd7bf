"""What reports are made of, whatever they are about: tables, plots, and the page that holds them."""
