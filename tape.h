// Kernels called directly and from a tape (tape.py).

#pragma once

#include <cstring>
#include <utility>

#include "kernels.h"

// A kernel that takes its arguments from a tape, eight bytes each.
template <class A>
static A slot(const i64& from) {
    A value;
    std::memcpy(&value, &from, sizeof value);
    return value;
}
template <auto F>
struct Unpacked;
template <class R, class... A, R (*F)(A...)>
struct Unpacked<F> {
    template <size_t... I>
    static void call(const i64* slots, std::index_sequence<I...>) { F(slot<A>(slots[I])...); }
    static void run(const i64* slots) { call(slots, std::index_sequence_for<A...>()); }
};

// What tape.py recorded: of each call the function above, the number of arguments, and these.
static void replay(i64 calls, const i64* at) {
    for (i64 i = 0; i < calls; i++, at += 2 + at[1]) slot<void (*)(const i64*)>(at[0])(at + 2);
}

struct Entry {
    void *direct, *unpacked;
};
template <auto F>
static constexpr Entry entry() { return {(void*)F, (void*)Unpacked<F>::run}; }
