using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Text;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>--replace and --block against the plainest program that does the same with all bytes before it.</summary>
public sealed class MatchTests
{
    private const int Cases = 100_000;
    private const int Never = 1_000_000; // ms

    [Fact]
    public async Task Replacing_in_pieces_is_replacing_in_the_whole()
    {
        Random random = new(1);
        int replaced = 0;
        for (int i = 0; i < Cases; i++)
        {
            int letters = random.Next(1, 5);
            (byte[] Old, byte[] New)[] pairs = [.. Enumerable.Range(0, random.Next(1, 6)).Select(
                _ => (Bytes(random, random.Next(1, random.Next(2, 9)), letters), Bytes(random, random.Next(5), letters + 2)))];
            MatchRule[] rules = [.. pairs.Select(pair => Rule(pair.Old, pair.New))];
            Sink sink = new();
            MatchTap tap = New(rules, sink);
            List<byte> expected = [];
            int longest = pairs.Max(pair => pair.Old.Length);
            int parts = random.Next(4) == 0 ? 3 : 1; // when time passes, what comes is replaced as if nothing stood before it
            for (int part = 0; part < parts; part++)
            {
                byte[] data = Bytes(random, random.Next(60), letters);
                int most = random.Next(1, 20);
                for (int at = 0; at < data.Length;)
                {
                    int length = Math.Min(random.Next(most) + 1, data.Length - at);
                    await tap.WriteAsync(data.AsMemory(at, length));
                    at += length;
                    byte[] due = [.. expected, .. Replaced(data.AsSpan(0, at), pairs, at - longest)];
                    Assert.True(sink.Bytes.ToArray().AsSpan().StartsWith(due), $"case {i}: what is decided is held");
                }

                expected.AddRange(Replaced(data, pairs, data.Length));
                replaced += expected.Count > 0 && !expected.SequenceEqual(data) ? 1 : 0;
                await tap.FinishAsync();
            }

            if (!expected.SequenceEqual(sink.Bytes.ToArray()))
            {
                Assert.Fail($"case {i}: {string.Join(", ", rules.Select(rule => rule.Words))}: "
                    + $"{Typed(sink.Bytes.ToArray())} instead of {Typed([.. expected])}");
            }
        }

        Assert.True(replaced > Cases / 2, $"{replaced}");
    }

    /// <summary>Whoever comes first wins, and what could still be a match of one written earlier is waited for.</summary>
    [Theory]
    [InlineData("abcd", "abc|d", "xxd=>1", "bcd=>2", "abc=>3")] // leftmost before written first
    [InlineData("abcX", "abc|X", "abcd=>1", "bc=>2")]
    [InlineData("aaaaX", "a|a|a|a|X", "aaaab=>1", "a=>2")] // each decided only by the X
    [InlineData("abababX", "ab|abab|X", "ababc=>1", "ab=>2", "ab=>3")]
    [InlineData("ab", "a|b", "a=>1", "ab=>2")] // the longer one is never the match
    public async Task The_leftmost_wins_and_of_one_place_the_first_written(string data, string pieces, params string[] words)
    {
        ArgumentNullException.ThrowIfNull(data);
        ArgumentNullException.ThrowIfNull(pieces);
        MatchRule[] rules = [.. words.Select(MatchRule.ParseReplace)];
        (byte[], byte[])[] pairs = [.. rules.Select(rule => (rule.Pattern, rule.Replacement!))];
        Sink sink = new();
        MatchTap tap = New(rules, sink);
        foreach (string piece in pieces.Split('|'))
        {
            await tap.WriteAsync(Encoding.UTF8.GetBytes(piece));
        }

        await tap.FinishAsync();
        byte[] expected = Replaced(Encoding.UTF8.GetBytes(data), pairs, data.Length);
        Assert.Equal(data, pieces.Replace("|", "", StringComparison.Ordinal));
        Assert.Equal(Encoding.UTF8.GetString(expected), Encoding.UTF8.GetString(sink.Bytes.ToArray()));
    }

    [Fact(Timeout = 20_000)]
    public async Task What_is_held_goes_on_when_its_time_has_passed_and_then_is_no_match()
    {
        Sink sink = new();
        MatchTap tap = New([MatchRule.ParseReplace("abcd=>X"), MatchRule.ParseReplace("b=>Y")], sink, patience: 20);
        long start = Environment.TickCount64;
        await tap.WriteAsync("zab"u8.ToArray());
        Assert.Equal("z", Text(sink));
        await sink.Grows("zaY"); // b is a match, as nothing else can become one any more
        Assert.InRange(Environment.TickCount64 - start, 20, 10_000);
        await tap.WriteAsync("cd"u8.ToArray());
        await tap.WriteAsync("abcd"u8.ToArray());
        Assert.Equal("zaYcdX", Text(sink));
    }

    [Fact(Timeout = 20_000)]
    public async Task Each_byte_that_comes_in_time_gives_those_before_it_new_time()
    {
        Sink sink = new();
        MatchTap tap = New([MatchRule.ParseReplace("aaaaaaaaaa=>X")], sink, patience: 2_000);
        for (int i = 0; i < 10; i++)
        {
            await Task.Delay(250, TestContext.Current.CancellationToken); // all together longer than the patience
            Assert.Equal("", Text(sink));
            await tap.WriteAsync("a"u8.ToArray());
        }

        Assert.Equal("X", Text(sink));
    }

    [Fact(Timeout = 20_000)]
    public async Task What_the_target_does_not_take_in_time_is_not_overtaken()
    {
        // the time passes while a write that has brought more still waits for the target
        Sink sink = new() { Gate = new TaskCompletionSource() };
        MatchTap tap = New([MatchRule.ParseReplace("ab=>X")], sink, patience: 10);
        Task first = tap.WriteAsync("1a"u8.ToArray()).AsTask();
        await Task.Delay(50, TestContext.Current.CancellationToken);
        Task second = tap.WriteAsync("b2a"u8.ToArray()).AsTask();
        await Task.Delay(50, TestContext.Current.CancellationToken);
        Assert.False(first.IsCompleted || second.IsCompleted);
        Assert.Equal(1, sink.Writes);
        sink.Gate.SetResult();
        await first;
        await second;
        await sink.Grows("1X2a");
    }

    [Fact(Timeout = 20_000)]
    public async Task Who_pauses_in_the_middle_of_what_is_blocked_does_not_get_the_rest_past()
    {
        Sink sink = new();
        MatchTap tap = New([new MatchRule("abcab!", "abcab!", null)], sink, patience: 20);
        await tap.WriteAsync("xabc"u8.ToArray());
        await Wait.Until(() => Text(sink) == "xabc", "what is held goes on");
        await tap.WriteAsync("ab"u8.ToArray());
        await Wait.Until(() => Text(sink) == "xabcab", "what is held goes on");
        await tap.WriteAsync("cab"u8.ToArray());
        await Wait.Until(() => Text(sink) == "xabcabcab", "what is held goes on");
        TapException error = await Assert.ThrowsAsync<TapException>(async () => await tap.WriteAsync("!z"u8.ToArray()));
        Assert.Equal("blocked by 'abcab!' at byte 4", error.Message);
        Assert.Equal("xabcabcab", Text(sink));
    }

    [Fact(Timeout = 20_000)]
    public async Task When_the_time_comes_of_what_was_decided_before_nothing_is_written()
    {
        Sink sink = new();
        MatchTap tap = New([Block("abc")], sink, patience: 20);
        await tap.WriteAsync("ab"u8.ToArray());
        await tap.WriteAsync("x"u8.ToArray());
        Assert.Equal("abx", Text(sink));
        int writes = sink.Writes;
        await Task.Delay(200, TestContext.Current.CancellationToken);
        Assert.Equal(writes, sink.Writes);
    }

    [Fact(Timeout = 20_000)]
    public async Task A_timer_that_comes_late_gives_new_bytes_their_own_time()
    {
        Sink sink = new() { Gate = new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously) };
        MatchTap tap = New([MatchRule.ParseReplace("ab=>X")], sink, patience: 400);
        await tap.WriteAsync("a"u8.ToArray());
        Task writing = tap.WriteAsync("1a"u8.ToArray()).AsTask();
        await Task.Delay(600, TestContext.Current.CancellationToken); // the time of the first byte passes, and waits for its turn
        sink.Gate.SetResult();
        await writing;
        await tap.WriteAsync("b"u8.ToArray());
        Assert.Equal("a1X", Text(sink));
        await tap.WriteAsync("a"u8.ToArray());
        await sink.Grows("a1Xa");
    }

    [Fact(Timeout = 20_000)]
    public async Task What_fails_in_its_own_time_is_told_to_the_line()
    {
        TaskCompletionSource<Exception> failed = new(TaskCreationOptions.RunContinuationsAsynchronously);
        MatchTap tap = New([Block("abc"), Block("ab")], new Sink(), patience: 1, failed.SetResult);
        await tap.WriteAsync("..ab"u8.ToArray());
        TapException error = Assert.IsType<TapException>(await failed.Task);
        Assert.Equal(("PD", "blocked by 'ab' at byte 2", false), (error.Reason.Code, error.Message, error.Reason.IsOrderly));
    }

    [Fact]
    public async Task A_block_passes_what_stands_before_it_and_says_where_it_was()
    {
        Sink sink = new();
        MatchTap tap = New([Block("secret"), Block("\\x00")], sink);
        await tap.WriteAsync("0123456789 se"u8.ToArray());
        await tap.WriteAsync("e sec"u8.ToArray());
        TapException error = await Assert.ThrowsAsync<TapException>(async () => await tap.WriteAsync("ret\0"u8.ToArray()));
        Assert.Equal("0123456789 see ", Text(sink));
        Assert.Equal("blocked by 'secret' at byte 15", error.Message);
    }

    [Fact]
    public async Task A_short_pattern_of_a_long_text_costs_one_buffer()
    {
        Sink sink = new();
        MatchTap tap = New([Rule("a"u8.ToArray(), new byte[100_000])], sink);
        await tap.WriteAsync(Enumerable.Repeat((byte)'a', 100).ToArray());
        Assert.Equal(100 * 100_000, sink.Bytes.Length);
        Assert.InRange(sink.Largest, 1, 64 << 10);
    }

    [Theory]
    [InlineData("a=>b", "a", "b")]
    [InlineData("a=>", "a", "")]
    [InlineData("a=>b=>c", "a", "b=>c")]
    [InlineData("\\x3d>=>\\\\", "=>", "\\")]
    [InlineData("\\n\\r\\t\\0\\x41=> b ", "\n\r\t\0A", " b ")]
    [InlineData("ż=>字", "ż", "字")]
    public void A_replacement_is_written_with_an_arrow_and_escapes(string text, string old, string replacement)
    {
        MatchRule rule = MatchRule.ParseReplace(text);
        Assert.Equal(Encoding.UTF8.GetBytes(old), rule.Pattern);
        Assert.Equal(Encoding.UTF8.GetBytes(replacement), rule.Replacement);
    }

    [Theory]
    [InlineData("")]
    [InlineData("a")]
    [InlineData("a=b")]
    [InlineData("=>")]
    [InlineData("=>b")]
    [InlineData("a\\=>b")]
    [InlineData("a=>\\q")]
    [InlineData("\\x4=>b")]
    public void What_is_no_replacement(string text) => Assert.Throws<FormatException>(() => MatchRule.ParseReplace(text));

    [Fact]
    public void Rules_of_a_direction_and_kind_that_follow_each_other_are_one_tap()
    {
        string[] words =
        [
            "127.0.0.1:0", "echo", "--replace-up", "a=>b", "--replace-down", "c=>d", "--replace-up", "b=>c", "--block-up", "x",
            "--block-up", "y", "--replace-up", "c=>d",
        ];
        Assert.Equal(4, CommandLine.Parse(words).Routes[0].Taps.Count);
    }

    [Fact]
    public void A_route_that_goes_on_with_the_defaults_leaves_them_to_the_others_as_they_are()
    {
        List<RouteSettings> routes = CommandLine.Parse(
        [
            "--replace-up", "a=>b", "-l", "127.0.0.1:0", "-u", "echo", "--replace-up", "c=>d", "-l", "127.0.0.1:0", "-u", "echo",
        ]).Routes;
        Assert.Equal([2, 1], routes.ConvertAll(route => Assert.IsType<MatchSettings>(Assert.Single(route.Taps)).Rules.Length));
    }

    [Fact]
    public void All_patterns_of_a_tap_have_at_most_sixteen_kilobytes()
    {
        string half = new('a', 8 << 10);
        List<TapSettings> taps = [];
        MatchSettings.Add(taps, isUp: true, MatchRule.ParseReplace($"{half}=>"));
        MatchSettings.Add(taps, isUp: true, MatchRule.ParseReplace($"{half}=>"));
        Assert.Throws<FormatException>(() => MatchSettings.Add(taps, isUp: true, MatchRule.ParseReplace("b=>")));
    }

    /// <summary>Any bytes can be written, and are read as they were written.</summary>
    [Fact]
    public void Fuzz_of_the_pattern_language() => FuzzTests.Run((random, _) =>
    {
        string[] pieces = ["=>", "=", ">", "\\", "\\\\", "\\x", "\\x3d", "\\n", "\\0", "a", "é", "\0", "\ud800", "f", " "];
        string text = string.Concat(Enumerable.Range(0, random.Next(8)).Select(_ => pieces[random.Next(pieces.Length)]));
        MatchRule? rule = null;
        try
        {
            rule = MatchRule.ParseReplace(text);
        }
        catch (FormatException e)
        {
            Assert.False(string.IsNullOrWhiteSpace(e.Message), text);
        }

        if (rule is not null)
        {
            MatchRule again = MatchRule.ParseReplace($"{Typed(rule.Pattern)}=>{Typed(rule.Replacement!)}");
            Assert.True(rule.Pattern.Length > 0);
            Assert.Equal(rule.Pattern, again.Pattern);
            Assert.Equal(rule.Replacement, again.Replacement);
        }
    });

    private static MatchRule Block(string text) => new(text, text, null);

    private static string Text(Sink sink) => Encoding.UTF8.GetString(sink.Bytes.ToArray());

    /// <summary>0xFE, 0xFF, 0, 1 ...</summary>
    private static byte[] Bytes(Random random, int length, int letters) =>
        [.. Enumerable.Range(0, length).Select(_ => (byte)(0xFE + random.Next(letters)))];

    private static MatchRule Rule(byte[] old, byte[] replacement) => MatchRule.ParseReplace($"{Typed(old)}=>{Typed(replacement)}");

    private static string Typed(byte[] bytes) => string.Concat(bytes.Select(b => $"\\x{b:x2}"));

    private static MatchTap New(MatchRule[] rules, Tap next, int patience = Never, Action<Exception>? failed = null)
    {
        TapLine line = new();
        line.Start(failed ?? (_ => { }), () => { });
        return new MatchTap(new Matcher([.. rules.Select(rule => rule.Pattern)]), rules, patience) { Next = next, Line = line };
    }

    /// <summary>What is decided of the data up to and including the byte <paramref name="last"/>.</summary>
    private static byte[] Replaced(ReadOnlySpan<byte> data, (byte[] Old, byte[] New)[] pairs, int last)
    {
        MemoryStream result = new();
        for (int at = 0; at < data.Length && at <= last;)
        {
            int which = 0;
            while (which < pairs.Length && !data[at..].StartsWith(pairs[which].Old))
            {
                which++;
            }

            result.Write(which == pairs.Length ? data.Slice(at, 1) : pairs[which].New);
            at += which == pairs.Length ? 1 : pairs[which].Old.Length;
        }

        return result.ToArray();
    }

    private sealed class Sink : Tap
    {
        private readonly System.Threading.Lock _lock = new();

        internal MemoryStream Bytes { get; } = new();
        internal int Writes { get; private set; }
        internal int Largest { get; private set; }
        internal TaskCompletionSource? Gate { get; init; }

        internal override async ValueTask WriteAsync(ReadOnlyMemory<byte> bytes)
        {
            Writes++;
            Largest = Math.Max(Largest, bytes.Length);
            await (Gate?.Task ?? Task.CompletedTask);
            lock (_lock)
            {
                Bytes.Write(bytes.Span);
            }
        }

        internal override ValueTask FinishAsync() => default;

        internal async Task Grows(string expected)
        {
            string text = "";
            while (text.Length < expected.Length)
            {
                await Task.Delay(1, TestContext.Current.CancellationToken);
                lock (_lock)
                {
                    text = Encoding.UTF8.GetString(Bytes.ToArray());
                }
            }

            Assert.Equal(expected, text);
        }
    }
}
