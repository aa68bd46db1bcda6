using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.IO;
using System.Net;
using System.Net.Sockets;
using System.Reflection;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

public sealed class PacketTests
{
    [Fact]
    public void The_checksum_is_the_one_of_the_RFCs_example()
    {
        ushort sum = InternetChecksum.Of([0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]); // RFC 1071, 3: the sum is ddf2
        Assert.Equal(0x220d, BinaryPrimitives.ReverseEndianness(sum));
    }

    [Fact]
    public void The_checksum_of_any_length_is_that_of_the_plain_sum()
    {
        Random random = new(1);
        for (int length = 0; length < 300; length++)
        {
            byte[] bytes = new byte[length];
            random.NextBytes(bytes);
            byte[] copy = new byte[length];
            Assert.Equal(Plain(bytes), BinaryPrimitives.ReverseEndianness(InternetChecksum.Of(bytes)));
            Assert.Equal(Plain(bytes), BinaryPrimitives.ReverseEndianness(InternetChecksum.Of([], InternetChecksum.Copy(bytes, copy))));
            Assert.Equal(bytes, copy);
        }

        byte[] ones = new byte[65535];
        Array.Fill(ones, byte.MaxValue);
        Assert.Equal(Plain(ones), BinaryPrimitives.ReverseEndianness(InternetChecksum.Of(ones)));
        Assert.Equal(Plain(ones), BinaryPrimitives.ReverseEndianness(InternetChecksum.Of([], InternetChecksum.Copy(ones, new byte[ones.Length]))));
    }

    [Fact]
    public async Task Numbers_of_bytes_wrap_as_those_of_TCP_do()
    {
        List<byte[]> packets = await Capture(new IPEndPoint(1, 1), async (_, up) =>
        {
            typeof(CaptureTap).GetField("_sequence", BindingFlags.NonPublic | BindingFlags.Instance)!.SetValue(up, uint.MaxValue - 9);
            await up.WriteAsync(new byte[100]);
            await up.WriteAsync(new byte[1]);
        });
        uint[] sequences = packets.ConvertAll(packet => BinaryPrimitives.ReadUInt32BigEndian(packet.AsSpan(24))).ToArray();
        uint[] acknowledged = packets.ConvertAll(packet => BinaryPrimitives.ReadUInt32BigEndian(packet.AsSpan(28))).ToArray();
        Assert.Equal([uint.MaxValue - 9, 90u], [sequences[3], sequences[5]]);
        Assert.Equal([90u, 91u], [acknowledged[4], acknowledged[6]]);
    }

    [Theory]
    [InlineData("192.0.2.77", "198.51.100.1", true)]
    [InlineData("::ffff:192.0.2.77", "198.51.100.1", true)]
    [InlineData("192.0.2.77", "2001:db8::1", false)]
    [InlineData("2001:db8::1", "192.0.2.77", false)]
    [InlineData("2001:db8::1", "2001:db8::2", false)]
    public async Task A_packet_is_of_IPv4_if_both_ends_are(string client, string server, bool isV4)
    {
        IPAddress from = IPAddress.Parse(client), to = IPAddress.Parse(server);
        List<byte[]> packets = await Capture(
            new IPEndPoint(from, 1234), (_, up) => up.WriteAsync("odd"u8.ToArray()).AsTask(), new IPEndPoint(to, 443));
        Assert.All(packets, packet =>
        {
            int ip = isV4 ? 20 : 40;
            Assert.Equal(isV4 ? 4 : 6, packet[0] >> 4);
            Assert.Equal(packet.Length, BinaryPrimitives.ReadUInt16BigEndian(packet.AsSpan(isV4 ? 2 : 4)) + (isV4 ? 0 : 40));
            Assert.Equal(0, isV4 ? Plain(packet[..20]) : 0);
            byte[] addresses = packet[(isV4 ? 12 : 8)..ip];
            byte[] pseudo = [.. addresses, 0, 6, (byte)((packet.Length - ip) >> 8), (byte)(packet.Length - ip), .. packet[ip..]];
            Assert.Equal(0, Plain(pseudo));
        });
        Assert.Equal(isV4 ? [.. from.MapToIPv4().GetAddressBytes(), .. to.MapToIPv4().GetAddressBytes()]
            : [.. from.MapToIPv6().GetAddressBytes(), .. to.MapToIPv6().GetAddressBytes()], packets[0][(isV4 ? 12 : 8)..(isV4 ? 20 : 40)]);
        Assert.Equal([0x04, 0xd2, 0x01, 0xbb], packets[0][(isV4 ? 20 : 40)..(isV4 ? 24 : 44)]);
        Assert.Equal([2, 18, 16, 24, 16], packets.ConvertAll(packet => (int)packet[(isV4 ? 20 : 40) + 13]));
    }

    [Theory]
    [InlineData("--", true, new[] { 17, 16, 17, 16 })]
    [InlineData("PD", true, new[] { 17, 16, 17, 16 })]
    [InlineData("CD", false, new[] { 20 })]
    [InlineData("cD", false, new[] { 20, 20 })]
    public async Task A_connection_ends_as_its_reason_says(string code, bool isOrderly, int[] expected)
    {
        List<byte[]> packets = await Capture(new IPEndPoint(1, 1), (conversation, _) =>
        {
            conversation.End(new CloseReason(code, "", isOrderly));
            return Task.CompletedTask;
        });
        Assert.Equal(expected, packets.ConvertAll(packet => (int)packet[33])[3..]);
    }

    [Fact]
    public void Two_names_of_one_file_are_one_capture_and_one_route_has_it_once()
    {
        CaptureSettings settings = new();
        List<TapSettings> first = [], second = [];
        settings.AddTo(first, "a");
        settings.AddTo(first, "./a");
        settings.AddTo(second, Path.GetFullPath("a"));
        settings.AddTo(second, "-");
        Assert.True(Assert.Single(first).Is(second[0]));
        Assert.Equal(2, second.Count);
    }

    /// <summary>The packets of one conversation.</summary>
    private static async Task<List<byte[]>> Capture(
        IPEndPoint client, Func<TcpProxy.Conversation, CaptureTap, Task> converse, IPEndPoint? server = null)
    {
        string file = Path.GetTempFileName();
        try
        {
            using Log log = new(new LogSettings { Format = LogFormat.Off });
            using Socket socket = new(SocketType.Stream, ProtocolType.Tcp);
            List<TapSettings> taps = [];
            CaptureSettings settings = new();
            settings.AddTo(taps, file);
            taps[0].Open(log);
            TcpProxy.Conversation conversation = new(
                "route", client, server ?? new IPEndPoint(2, 2), isEcho: false, default, seed: 0, number: 1);
            conversation.Begin(taps, socket, null);
            await converse(conversation, (CaptureTap)conversation.Up!.First);
            taps[0].Close();
            List<byte[]> packets = [];
            byte[] bytes = await File.ReadAllBytesAsync(file, TestContext.Current.CancellationToken);
            for (int i = 88; i < bytes.Length; i += BitConverter.ToInt32(bytes, i + 4))
            {
                packets.Add(bytes[(i + 28)..(i + 28 + BitConverter.ToInt32(bytes, i + 20))]);
            }

            return packets;
        }
        finally
        {
            File.Delete(file);
        }
    }

    private static ushort Plain(byte[] bytes)
    {
        uint sum = 0;
        for (int i = 0; i < bytes.Length; i++)
        {
            sum += (uint)(bytes[i] << (i % 2 == 0 ? 8 : 0));
            sum = (sum & 0xffff) + (sum >> 16);
        }

        return (ushort)~sum;
    }
}
