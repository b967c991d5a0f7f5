"""What several tests share: tiny corpora, models and runs, servers, and the command line."""
