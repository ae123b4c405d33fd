/* Sizes of structs, places of their fields, and constants, by their names: Python has the same, and compares (layout.py). */
#pragma once

#include <stddef.h>
#include <stdint.h>

typedef struct {
    const char *name;
    double value;
} Entry;

#define STRUCT(type) {#type " size", sizeof(type)}
#define FIELD(type, field)                                                                                                 \
    {#type "." #field " start", offsetof(type, field)},                                                                    \
    {#type "." #field " end", offsetof(type, field) + sizeof(((type *)0)->field)}
#define CONSTANT(name) {#name, name}

/* What Python asks for: let `entries` point to those of this library; return how many there are. */
#define EXPORT_LAYOUT(...)                                                                                                 \
    int64_t layout(const Entry **entries)                                                                                  \
    {                                                                                                                      \
        static const Entry all[] = {__VA_ARGS__};                                                                          \
        *entries = all;                                                                                                    \
        return sizeof all / sizeof *all;                                                                                   \
    }
