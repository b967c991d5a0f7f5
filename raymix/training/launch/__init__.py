"""Starting a run: in this process, or on Ray with its workers, placement and rendezvous."""
