// Threads: those of the host program's OpenMP where it names them, else a small persistent pool of our own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace ck {

// Calls task(0) ... task(count - 1), each once, on at most `threads` threads of which the caller is one.
// Tasks are handed out in order to whoever is free: results that must not depend on the number of threads
// must not depend on who runs a task. The first exception that a task throws is thrown here once all threads
// have stopped. A call that finds the pool busy (another thread of the program is in here) runs alone.
// A forked child starts with a fresh pool.
void parallel_for(int threads, int64_t count, const std::function<void(int64_t)>& task);

// OpenMP's entry point: run(function, data, threads, flags) calls function(data) on every thread of a team.
// A framework's idle OpenMP threads spin for milliseconds after each of its operations, so a second pool
// beside them has to share their cores; with GOMP_parallel of the very library that the framework uses there
// is one pool. nullptr: the own pool. A forked child falls back to it, since OpenMP does not survive a fork.
using HostParallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
void use_host_threads(HostParallel run);

// 64-byte aligned memory that belongs to the calling thread, with unspecified content. It is valid until the
// thread asks again for the same purpose; up to a limit it is kept between calls, because fresh pages cost
// more than small kernels.
enum class Scratch { kTask, kCall };
void* thread_scratch(Scratch purpose, size_t bytes);

}  // namespace ck
