package org.llamapte

/**
 * An opened .pte, over libllama_runner's C interface (llama_runner.h).
 *
 *     LlamaRunner(path).use { runner -> runner.generate("Once upon a time").forEach(::print) }
 *
 * Bad input throws IllegalArgumentException with a sentence that says what to do.
 */
class LlamaRunner(path: String, threads: Long = 0) : AutoCloseable {
    private val program = open(path, threads)

    /** The texts that follow a prompt, one for each token. To be consumed by one thread, before [close]. */
    fun generate(
        prompt: String,
        temperature: Double = 0.0,
        topP: Double = 1.0,
        seed: Long = 0,
        maxNewTokens: Long = 0,
    ): Sequence<String> = sequence {
        val session = newSession(program)
        try {
            start(session, encode(program, prompt.toByteArray()), temperature, topP, seed, maxNewTokens)
            while (true) yield(String(next(session) ?: break))
        } finally {
            freeSession(session)
        }
    }

    override fun close() = close(program)

    private external fun open(path: String, threads: Long): Long
    private external fun close(program: Long)
    private external fun newSession(program: Long): Long
    private external fun freeSession(session: Long)
    private external fun encode(program: Long, text: ByteArray): LongArray
    private external fun start(
        session: Long,
        prompt: LongArray,
        temperature: Double,
        topP: Double,
        seed: Long,
        maxNewTokens: Long,
    )
    private external fun next(session: Long): ByteArray?

    private companion object {
        init {
            System.loadLibrary("llama_runner_jni")
        }
    }
}
