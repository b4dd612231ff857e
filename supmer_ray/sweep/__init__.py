"""What a sweep consists of: the space that it searches, its trials, who watches them, and its picture."""
