// How tests steer and look into the stand-in; called through ctypes.
#pragma once

#include <cuda.h>

#include <cstdint>

extern "C" {

// The `nth` call from now (1: the next one) of the entry point `name` returns `code` and does
// nothing. "*" stands for every entry point that does not give something back: releasing cannot
// fail without leaking. One fault at a time.
void standin_fail(const char* name, std::int64_t nth, int code);

// The entry point in which the last fault was raised; empty while it was not.
const char* standin_fault_raised();

// Calls of an entry point so far, all its versions together; "*" counts what "*" can fail.
std::int64_t standin_calls(const char* name);

// What callers did so far that a real driver might not survive, or that checkers report as errors:
// "dead stream": a handle was passed that names no stream, or none any more; "unknown version": an
// entry point was asked for in the form of a CUDA version newer than the driver.
std::int64_t standin_misuses(const char* what);

// What is alive in this process: "handles", "mappings", "reservations", "allocations" (cuMemAlloc,
// cuMemAllocHost), "memory_bytes", "streams", "events", "graphs", "graph_execs",
// "modules", "contexts" (references to primary contexts), "current" (contexts on this thread's
// stack), "descriptors" (exported and not closed), "orphans" (streams and events that died with
// their context). -1: no such kind.
std::int64_t standin_live(const char* kind);

// Replaces an environment variable of the stand-in, at once and for this process.
void standin_set(const char* name, const char* value);

// The sticky error of a device's context, 0 when there is none.
int standin_context_error(int device);
}
