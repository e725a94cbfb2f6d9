"""One thin adapter per inference engine; none of them decides anything (design section 4.7)."""
