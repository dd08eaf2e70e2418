"""Trees and texts of three sides become one."""
