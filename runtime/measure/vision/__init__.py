"""Vision parts of engines measured alone, and the integer peak that int8 ones are held against."""
